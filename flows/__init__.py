"""When and where: the flow over DVC's graph, the command line, and the local services."""

import os

# Read by Prefect and MLflow when they are imported: nothing leaves the machine.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

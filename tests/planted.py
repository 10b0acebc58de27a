"""Secrets that tests put into the environment, and where they turn up again."""

import base64
from collections.abc import Collection
from pathlib import Path

SECRETS = {
    "AWS_ACCESS_KEY_ID": "PLANTEDAWSKEY5520",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret+7731",
    "MLFLOW_TRACKING_USERNAME": "planted-mlflow-user-81",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password-93",
    "PREFECT_API_AUTH_STRING": "planted-prefect-user:planted-prefect-password-27",
    "HF_TOKEN": "hf_plantedTokenOfTheHub64",
    "POSTGRES_PASSWORD": "planted-postgres-password-12",
}


def _forms() -> dict[bytes, str]:
    """Each secret as it is, and as headers of basic authentication have it."""
    forms = {value.encode(): name for name, value in SECRETS.items()}
    account = f"{SECRETS['MLFLOW_TRACKING_USERNAME']}:{SECRETS['MLFLOW_TRACKING_PASSWORD']}"
    forms[base64.b64encode(account.encode())] = "MLFLOW_TRACKING_PASSWORD"
    forms[base64.b64encode(SECRETS["PREFECT_API_AUTH_STRING"].encode())] = "PREFECT_API_AUTH_STRING"
    return forms


def files_with_secrets(folder: Path, meant: Collection[str] = ()) -> list[str]:
    """`file: secret` of every file below a folder, databases too, that holds one; `meant` are files that should."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in meant:
            content = path.read_bytes()
            found += [f"{name}: {secret}" for form, secret in _forms().items() if form in content]
    return found

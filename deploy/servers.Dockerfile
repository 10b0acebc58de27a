# Prefect's and MLflow's servers, at the versions of the lock; built by deploy/compose.yaml.
FROM python:3.11.13-slim-bookworm
COPY requirements.lock /tmp/requirements.lock
RUN pip install --no-cache-dir --constraint /tmp/requirements.lock \
    mlflow prefect "psycopg[binary]==3.3.9" "Flask-WTF==1.3.0" "boto3==1.44.8"
RUN useradd --create-home --uid 10001 vdmini
USER vdmini
WORKDIR /home/vdmini

"""MLflow's server with its users and its records in one database, migrated before it serves.

Everything comes from the environment, so that no secret stands in a process list or an image:

    MLFLOW_BACKEND_STORE_URI        database of the records, postgresql://...
    MLFLOW_AUTH_DATABASE_URI        database of the users, another one
    MLFLOW_ARTIFACTS_DESTINATION    s3://BUCKET/PATH; AWS_* as usual
    MLFLOW_AUTH_ADMIN_USERNAME, MLFLOW_AUTH_ADMIN_PASSWORD (12 characters or more)
    MLFLOW_FLASK_SERVER_SECRET_KEY  the same for every replica
    MLFLOW_SERVER_ALLOWED_HOSTS     exact, with the port: mlflow:5000,localhost:5000
    MLFLOW_HOST, MLFLOW_PORT        0.0.0.0 and 5000 where left out
"""

import configparser
import os
import sys
import tempfile
from pathlib import Path

from mlflow.db import commands

REQUIRED = (
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_AUTH_DATABASE_URI",
    "MLFLOW_ARTIFACTS_DESTINATION",
    "MLFLOW_AUTH_ADMIN_USERNAME",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_SERVER_ALLOWED_HOSTS",
)


def main() -> None:
    """Check the environment, migrate the records' database, and become the server."""
    missing = [name for name in REQUIRED if not os.environ.get(name)]
    if missing:
        sys.exit(f"serve: {', '.join(missing)}: not set; the server does not start without")
    commands.main(["upgrade", os.environ["MLFLOW_BACKEND_STORE_URI"]], standalone_mode=False)
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(write_auth_config())
    os.environ.setdefault("MLFLOW_HOST", "0.0.0.0")
    if not os.environ.get("MLFLOW_PORT", "").isdigit():  # Kubernetes sets it to tcp://HOST:PORT
        os.environ["MLFLOW_PORT"] = "5000"
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    os.execv(command[0], command)


def write_auth_config() -> Path:
    """Write the file that MLflow takes the users' database from, for this user's eyes alone.

    Whoever has no permission of his own may do nothing.
    """
    config = configparser.ConfigParser(interpolation=None)  # passwords may hold a %
    config["mlflow"] = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": os.environ["MLFLOW_AUTH_DATABASE_URI"],
    }
    descriptor, path = tempfile.mkstemp(prefix="mlflow-auth-", suffix=".ini")
    with os.fdopen(descriptor, "w") as file:
        config.write(file)
    return Path(path)


if __name__ == "__main__":
    main()

"""Which variables are there to hold a secret."""

from __future__ import annotations

import pytest

from cluster.secret_names import holds_secret


@pytest.mark.parametrize(
    ("text", "is_secret"),
    [
        ("MLFLOW_TRACKING_TOKEN=x", True),
        ("aws_secret_access_key=x", True),
        ("DB_PASSWD=x", True),
        ("WANDB_API_KEY=x", True),
        ("GOOGLE_APPLICATION_CREDENTIALS=/mnt/key.json", True),  # its file is better given by --secret
        ("BASIC_AUTH=x", True),
        ("DATABASE_DSN=x", True),
        ("RAY_AUTH_TOKEN_PATH=/mnt/token", False),
        ("AWS_SHARED_CREDENTIALS_FILE=/mnt/aws", False),
        ("AUTH_URL=https://login.example/x", False),
        ("RAY_AUTH_TOKEN_PATH=hunter2", True),  # no place
        ("RAY_AUTH_MODE=token", False),
        ("MLFLOW_TRACKING_URI=https://mlflow.example", False),
        ("OMP_NUM_THREADS=4", False),
        ("KEYBOARD=de", False),
    ],
)
def test_holds_secret__by_its_name_unless_it_is_of_a_place(text: str, is_secret: bool) -> None:
    assert holds_secret(*text.split("=")) == is_secret

"""The settings. `PROJECT_DATABASES` has the setting DATABASES as JSON; `PROJECT_SETTINGS` may have others."""

import json
import os

DATABASES = {
    alias: {"ENGINE": "django.db.backends.postgresql", **database}
    for alias, database in json.loads(os.environ["PROJECT_DATABASES"]).items()
}
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "procrastinate.contrib.django",
    "procrastinate_stalled.contrib.django",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
ROOT_URLCONF = "tests.django_project.urls"
SECRET_KEY = "of a test"
ALLOWED_HOSTS = ["testserver"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
USE_TZ = True
TIME_ZONE = "UTC"
# None: the tests keep their own.
LOGGING_CONFIG = None
# Django's own checks ask for one.
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

globals().update(json.loads(os.environ.get("PROJECT_SETTINGS", "{}")))

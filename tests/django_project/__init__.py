"""A Django project with Procrastinate and this product, as users have it."""

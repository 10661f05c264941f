"""procrastinate_stalled as an app of Django, next to ``procrastinate.contrib.django``.

It has a migration, an admin for the rules and the records of rescues and sweeps, the command
``manage.py procrastinate_stalled``, and a system check that warns when nothing sweeps.
"""

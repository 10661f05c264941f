-- Everything runs with the rights of its caller, and nobody has any here but the owner until he grants them.

REVOKE ALL ON SCHEMA procrastinate_stalled FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA procrastinate_stalled FROM PUBLIC;

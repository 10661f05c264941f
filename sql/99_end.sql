-- The end of the transaction that 10_prerequisites.sql wants.

DO $$
BEGIN
    PERFORM set_config('default_transaction_read_only', current_setting('procrastinate_stalled.read_only'), false);
END;
$$;

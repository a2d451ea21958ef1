"""What people look at: figures, tables and pages, made from what runs, sweeps and studies leave behind."""

"""What people see of a run: terminal, summary, report."""

"""What people read: tables, plots and pages, each made from finished figures."""

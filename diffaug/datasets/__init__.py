"""Reading, checking and building datasets of medical scans."""

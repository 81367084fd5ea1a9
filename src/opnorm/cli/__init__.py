"""The command line. Each command imports torch when it runs, never before."""

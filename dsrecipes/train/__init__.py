"""Training, the one active thing: sets up, runs, saves and resumes."""

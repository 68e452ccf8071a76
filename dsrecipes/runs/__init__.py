"""The passive run folder: its layout, manifests of checkpoints, the log, the reference for verify, the curve."""

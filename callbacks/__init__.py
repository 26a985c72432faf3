"""What happens around a training step: schedule, checkpoints, validation, throughput."""

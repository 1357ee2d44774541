"""What an adapter is as files: its config, its tensors, its manifest; and what is wrong with those of others."""

"""The names of the files that an adapter consists of. Knows nothing of what is in them."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"  # what PEFT's files have no place for; of its keys base_fingerprint alone is read
CONTENT_FILES = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)  # in the order in which they are hashed
REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)

"""Files of tensors in the safetensors format: read without trust, offered by name, written resumably."""

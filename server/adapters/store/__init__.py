"""The store tier: adapter files under names and versions, in a folder or in an object store."""

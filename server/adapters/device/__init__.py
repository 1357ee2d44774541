"""The device tier: rank rows and slots, and the forms in which a step reads them."""

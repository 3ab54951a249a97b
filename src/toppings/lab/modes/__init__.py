"""Loading modes compared, and what step logs say of them."""

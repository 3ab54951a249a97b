"""What structured output is tested and measured with, here and in the tests."""

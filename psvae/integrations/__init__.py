"""Faces for other libraries. diffusers.py needs the library that it is named after; comfyui.py does not."""

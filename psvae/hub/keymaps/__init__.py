"""One file per foreign layout: how to recognise it, and how its names and configuration become ours."""

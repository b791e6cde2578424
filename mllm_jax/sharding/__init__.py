"""From one device to a pod: meshes, which axis is split over what, many processes."""

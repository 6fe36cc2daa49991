"""What the user wrote: the config's shape and how a file becomes one."""

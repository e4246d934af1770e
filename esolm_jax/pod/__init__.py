"""What a step costs on a TPU pod, found out on a machine without one."""

"""What a run stands on: devices, processes, signals and its folder."""

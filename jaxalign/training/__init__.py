"""Floor 6: the runtime. Devices, disk and clock; it runs any Algorithm and knows none."""

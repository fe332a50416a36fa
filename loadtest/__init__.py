"""A black box load tester for LVM Serve: open loop, one core, no import of `service` or `models`."""

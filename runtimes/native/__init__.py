"""The compiled kernels of ai.reft::LoReFT; ``lib/`` holds the library where the installation could build one."""

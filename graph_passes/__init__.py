"""Folds edits into decoder graphs: finds the sites, inserts ai.reft::LoReFT, adds slots, banks and function bodies. Needs onnx-ir."""

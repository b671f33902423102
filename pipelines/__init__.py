"""The distributed flow: stages that meet through artefacts alone, and the leaves they share."""

"""Adapters of other libraries: one reader a format, each giving a ForeignAdapter, which ``assemble`` turns into ours."""

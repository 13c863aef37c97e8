"""The documentation site: what mkdocs needs to know of this repository, and the check of links to lines of code."""

"""report.html, the page of a run: from one value to HTML, pictures as data, and a server for this machine alone."""

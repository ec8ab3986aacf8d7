"""quire's own door: HTTP in, HTTP out, answers passed on as bytes."""

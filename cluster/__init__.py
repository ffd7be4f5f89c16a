"""What a cluster needs: job submission, manifests, image, local test clusters. Names the jobs and the application by
import string and command line; imports ``crem.errors`` and nothing else of ``crem``, ``pipelines`` or ``serve``."""

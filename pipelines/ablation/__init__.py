"""``crem ablate``: the paper's Tables 3 and 4 and Figure 4, trained anew beside the paper's figures."""

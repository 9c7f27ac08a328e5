"""What users ask for: lengths, arrivals and classes of requests, from traces and from distributions, by seed.

Everything here is fixed before a simulation begins, so that policies are compared on the same requests.
"""

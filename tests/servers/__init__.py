"""Real servers for tests and benches, each a context manager: started on free loopback ports, killed by pid at the end.

with HubServer() as hub: …            a Hugging Face hub with a CDN on a second port, and faults on demand
with SeaweedServer() as s3: …         SeaweedFS' S3
with NginxServer(directory) as web:   static files with ranges
with BlackHole() as hole: …           accepts and never answers
with FaultyProxy(port, …) as proxy:   a TCP proxy that delays, drops and corrupts
"""

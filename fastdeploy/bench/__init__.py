"""`fastdeploy bench`: how fast an engine or a server is, on workloads that anybody can repeat."""

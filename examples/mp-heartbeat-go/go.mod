module mp-heartbeat-go

go 1.24

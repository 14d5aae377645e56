module warden-go

go 1.24

require stockade.dev/plugin v0.0.0

replace stockade.dev/plugin => ../../../plugin-sdk/go

module stockade.dev/plugin

go 1.24

package plugin

import "stockade.dev/plugin/internal/abi"

// AddMetric adds to a counter of the plugin's own, which the server shows at /metrics as
// stockade_plugin_custom_total{plugin,name}. It is Limit for a further name when the manifest's metrics are
// used up, and Invalid for a name of other than a-z, 0-9 and _, a letter first, or a value below 0.
func AddMetric(name string, value float64) error { return done(abi.MetricAdd(name, value)) }

// SetMetric sets a gauge, shown as stockade_plugin_custom_gauge{plugin,name}; errors are those of AddMetric, but a gauge may be negative.
func SetMetric(name string, value float64) error { return done(abi.MetricSet(name, value)) }

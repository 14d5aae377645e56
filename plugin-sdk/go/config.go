package plugin

import (
	"encoding/json"
	"fmt"
	"math"
	"time"

	"stockade.dev/plugin/internal/abi"
)

// Config holds the server's settings, as LMCache's plugins know them from LMCACHE_RUNTIME_PLUGIN_CONFIG.
// Names are LMCache 0.5.6's. A field that the server does not send is empty, and one that this module
// does not know is in Raw. Secrets are blackened by the server.
type Config struct {
	// MP is the server of engines.
	MP MPConfig `json:"mp_config"`
	// StorageManager is the pool and what lies below it.
	StorageManager StorageManagerConfig `json:"storage_manager_config"`
	// Obs is metrics, logs and traces.
	Obs ObsConfig `json:"obs_config"`
	// HTTP is the HTTP API.
	HTTP HTTPConfig `json:"http_config"`
	// Extra holds settings of plugins: the JSON of --runtime-plugin-config. By convention,
	// "<plugin>.<setting>".
	Extra map[string]json.RawMessage `json:"runtime_plugin_extra_config"`
	// Raw is all of it as it came.
	Raw json.RawMessage `json:"-"`
}

// MPConfig is the server of engines.
type MPConfig struct {
	Transport                string   `json:"transport"`                   // zmq
	Host                     string   `json:"host"`                        // that it is bound to
	Port                     uint16   `json:"port"`                        // that it is bound to
	ChunkSize                uint64   `json:"chunk_size"`                  // tokens of a chunk
	HashAlgorithm            string   `json:"hash_algorithm"`              // such as blake3
	SupportedTransferMode    string   `json:"supported_transfer_mode"`     // engine_driven or auto
	ShmName                  string   `json:"shm_name"`                    // of the shared memory; empty without
	InstanceID               string   `json:"instance_id"`                 // identity of the server
	RuntimePluginLocations   []string `json:"runtime_plugin_locations"`    // where plugins are looked for
	WorkerReapTimeoutSeconds float64  `json:"worker_reap_timeout_seconds"` // of silence
	SessionTTLSeconds        float64  `json:"session_ttl_seconds"`         // of idle sessions
	KVEventLogSize           uint64   `json:"kv_event_log_size"`           // records kept for subscribers
}

// StorageManagerConfig is the pool and what lies below it.
type StorageManagerConfig struct {
	L1Manager      L1ManagerConfig `json:"l1_manager_config"` // the pool
	Eviction       EvictionConfig  `json:"eviction_config"`   // how the pool makes room
	L2Adapter      L2AdapterConfig `json:"l2_adapter_config"` // the second tiers
	StorePolicy    string          `json:"store_policy"`      // what is stored below
	PrefetchPolicy string          `json:"prefetch_policy"`   // what is loaded from below
}

// L1ManagerConfig is the pool.
type L1ManagerConfig struct {
	Memory          MemoryConfig `json:"memory_config"`     // its memory
	WriteTTLSeconds float64      `json:"write_ttl_seconds"` // that a reservation lives
	ReadTTLSeconds  float64      `json:"read_ttl_seconds"`  // that an unused read lock lives
}

// MemoryConfig is the memory of the pool.
type MemoryConfig struct {
	SizeInBytes     uint64 `json:"size_in_bytes"`      // its size
	UseLazy         bool   `json:"use_lazy"`           // whether it grows with its use
	InitSizeInBytes uint64 `json:"init_size_in_bytes"` // its size at first
	AlignBytes      uint64 `json:"align_bytes"`        // alignment of objects
	ShmName         string `json:"shm_name"`           // of the shared memory; empty without
}

// EvictionConfig says how the pool makes room.
type EvictionConfig struct {
	Policy           string  `json:"eviction_policy"`   // such as LRU
	TriggerWatermark float64 `json:"trigger_watermark"` // use of the pool at which it begins, 0 to 1
	Ratio            float64 `json:"eviction_ratio"`    // share of the bytes in use that goes at once
}

// L2AdapterConfig is the second tiers.
type L2AdapterConfig struct {
	Adapters []json.RawMessage `json:"adapters"` // each as it was given, without its secrets
}

// ObsConfig is metrics, logs and traces.
type ObsConfig struct {
	Enabled        bool                `json:"enabled"`         // whether there are any
	MetricsEnabled bool                `json:"metrics_enabled"` // whether there are metrics
	LoggingEnabled bool                `json:"logging_enabled"` // whether there are logs
	TracingEnabled bool                `json:"tracing_enabled"` // whether there are traces
	PrometheusPort uint16              `json:"prometheus_port"` // where metrics are served
	LookupHashLog  LookupHashLogConfig `json:"lookup_hash_log"` // the log of what is looked up
}

// LookupHashLogConfig is the log of what is looked up.
type LookupHashLogConfig struct {
	OutputDir           string `json:"output_dir"`            // on the host; empty without
	RotationIntervalSec uint64 `json:"rotation_interval_sec"` // after which a file ends
	RotationMaxSize     uint64 `json:"rotation_max_size"`     // bytes after which a file ends
	MaxFiles            uint64 `json:"max_files"`             // that are kept
}

// HTTPConfig is the HTTP API.
type HTTPConfig struct {
	Host string `json:"http_host"` // that it is bound to
	Port uint16 `json:"http_port"` // that it is bound to
}

// LoadConfig gives the settings that the server has. It fails when a field is of another type than LMCache
// gives it; the error names it.
func LoadConfig() (*Config, error) {
	text, err := answered(abi.Config())
	if err != nil {
		return nil, err
	}
	return ParseConfig(text)
}

// ParseConfig reads settings from a text, such as the environment variable of a program without imports.
func ParseConfig(text []byte) (*Config, error) {
	// null is nothing to Unmarshal.
	var config *Config
	if err := json.Unmarshal(text, &config); err != nil {
		return nil, &Error{Code: Invalid, Message: "the configuration cannot be used: " + err.Error()}
	}
	if config == nil {
		return nil, &Error{Code: Invalid, Message: "the configuration is not a JSON object"}
	}
	config.Raw = append(json.RawMessage(nil), text...)
	return config, nil
}

// Setting reads a setting of plugins, by its whole name; it tells whether it is set, and not null. An error
// names it.
func (c *Config) Setting(name string, into any) (bool, error) {
	value, ok := c.Extra[name]
	if !ok || string(value) == "null" {
		return false, nil
	}
	if err := json.Unmarshal(value, into); err != nil {
		return false, &Error{Code: Invalid, Message: "setting `" + name + "`: " + err.Error()}
	}
	return true, nil
}

// Required is Setting, but an error that says how to set it where it is not.
func (c *Config) Required(name string, into any) error {
	ok, err := c.Setting(name, into)
	if err == nil && !ok {
		return &Error{Code: NotFound, Message: fmt.Sprintf(
			`setting %[1]s is missing: start the server with --runtime-plugin-config '{"%[1]s": ...}'`, name)}
	}
	return err
}

// Seconds is a setting that is a time in seconds from least to most, or otherwise where it is not set.
func (c *Config) Seconds(name string, least, most float64, otherwise time.Duration) (time.Duration, error) {
	var seconds float64
	ok, err := c.Setting(name, &seconds)
	if err != nil || !ok {
		return otherwise, err
	}
	// What a Duration cannot hold is out of every range, as is what is no number.
	if !(least <= seconds && seconds <= most && seconds < math.MaxInt64/float64(time.Second)) {
		return otherwise, &Error{Code: Invalid, Message: fmt.Sprintf(
			"setting `%s` is %v: give seconds from %v to %v", name, seconds, least, most)}
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

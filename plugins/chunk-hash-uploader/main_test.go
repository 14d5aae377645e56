package main

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"stockade.dev/plugin"
	"stockade.dev/plugin/plugintest"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// stored are the objects of a store, by name.
type stored map[string]string

// server is a host with a directory and a store that answers with the next of statuses, then with 200.
func server(t *testing.T, statuses ...int) (*plugintest.Host, string, stored) {
	dir, objects := t.TempDir(), stored{}
	host := plugintest.New(t).Setting("chunk_hash_uploader.url", "http://s3:9000/bucket/a%20b").
		Setting("chunk_hash_uploader.directory", dir)
	host.HTTP = func(request *plugin.HTTPRequest) (int, []byte, error) {
		status := 200
		if len(statuses) > 0 {
			status, statuses = statuses[0], statuses[1:]
		}
		if status == 200 {
			objects[strings.TrimPrefix(request.URL, "http://s3:9000/bucket/a%20b/")] = string(request.Body)
		}
		return status, []byte("<Code>SlowDown</Code>"), nil
	}
	return host, dir, objects
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
}

func listed(t *testing.T, dir string) []string {
	t.Helper()
	names, err := logs(dir)
	must(t, err)
	return names
}

func start(t *testing.T, host *plugintest.Host) *plugintest.Running {
	t.Helper()
	running, err := host.Start(&uploader{})
	must(t, err)
	return running
}

const (
	first  = "lookup_hashes_20260401_143025_000000.jsonl"
	second = "lookup_hashes_20260401_203025_000001.jsonl"
	third  = "lookup_hashes_20260402_023025_000002.jsonl"
)

func TestWhatIsWholeIsShippedAndArchived(t *testing.T) {
	host, dir, objects := server(t)
	write(t, dir, first, "{}\n")
	write(t, dir, second, "{\"a\": 1}\n")
	write(t, dir, third, "{\"unfini")
	write(t, dir, "notes.txt", "mine")
	must(t, start(t, host).Advance(time.Second))
	if len(objects) != 2 || objects[first] != "{}\n" || objects[second] != "{\"a\": 1}\n" {
		t.Errorf("stored %v", objects)
	}
	if names := listed(t, dir); !slices.Equal(names, []string{third}) {
		t.Errorf("left %v", names)
	}
	if names := listed(t, filepath.Join(dir, archive)); !slices.Equal(names, []string{first, second}) {
		t.Errorf("archived %v", names)
	}
	if host.Counters["files_uploaded"] != 2 || host.Counters["bytes_uploaded"] != 12 || host.Gauges["files_waiting"] != 0 {
		t.Errorf("metrics %v %v", host.Counters, host.Gauges)
	}
}

func TestAStoreThatIsDownGetsTheFileLater(t *testing.T) {
	host, dir, objects := server(t, 503, 403)
	write(t, dir, first, "{}\n")
	write(t, dir, second, "")
	running := start(t, host)
	for range 2 {
		if err := running.Advance(time.Minute); err == nil || !strings.Contains(err.Error(), "SlowDown") {
			t.Errorf("a failed upload is %v", err)
		}
	}
	if names := listed(t, dir); len(names) != 2 || len(objects) != 0 {
		t.Errorf("left %v, stored %v", names, objects)
	}
	must(t, running.Advance(time.Minute))
	if objects[first] != "{}\n" || host.Counters["upload_failures"] != 2 {
		t.Errorf("stored %v, %v", objects, host.Counters)
	}
}

func TestALargeFileIsShippedInPiecesOfWholeLines(t *testing.T) {
	host, dir, objects := server(t)
	host.Setting("chunk_hash_uploader.piece_kib", 16)
	var text strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&text, "{\"line\": %d, \"chunk_hashes\": [\"0x%064x\"]}\n", i, i)
	}
	write(t, dir, first, text.String())
	write(t, dir, second, "")
	must(t, start(t, host).Advance(time.Second))
	var joined strings.Builder
	names := make([]string, 0, len(objects))
	for name := range objects {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if !strings.HasSuffix(objects[name], "}\n") || len(objects[name]) > 16<<10 {
			t.Errorf("%s ends with %q after %d bytes", name, objects[name][len(objects[name])-3:], len(objects[name]))
		}
		joined.WriteString(objects[name])
	}
	if want := "lookup_hashes_20260401_143025_000000.000000.jsonl"; names[0] != want || len(names) < 6 {
		t.Errorf("objects %v", names)
	}
	if joined.String() != text.String() {
		t.Error("the pieces are not the file")
	}
}

func TestAPieceThatEndsWithTheFileIsTheLast(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, first, "12345\n")
	piece, err := (&upload{name: first}).next(dir, 6)
	must(t, err)
	if !piece.isLast || piece.name != first || string(piece.lines) != "12345\n" {
		t.Errorf("piece %+v", piece)
	}
	if _, err := (&upload{name: first}).next(dir, 3); err == nil {
		t.Error("a line longer than a piece was cut")
	}
}

func TestTheNewestFileIsShippedOnceTheServerCannotWriteItAnyMore(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, first, "{}\n")
	for age, want := range map[time.Duration]int{time.Minute: 0, 3 * time.Hour: 1} {
		names, err := whole(dir, time.Now().Add(age), time.Hour)
		must(t, err)
		if len(names) != want {
			t.Errorf("after %v: %v", age, names)
		}
	}
	if names, err := whole(dir, time.Now().Add(1e6*time.Hour), 0); err != nil || len(names) != 0 {
		t.Errorf("%v, %v", names, err)
	}
}

func TestTheArchiveKeepsSoMany(t *testing.T) {
	host, dir, _ := server(t)
	host.Setting("chunk_hash_uploader.archive_files", 1)
	write(t, dir, first, "{}\n")
	write(t, dir, second, "{}\n")
	write(t, dir, third, "")
	must(t, start(t, host).Advance(time.Second))
	if names := listed(t, filepath.Join(dir, archive)); !slices.Equal(names, []string{second}) {
		t.Errorf("archived %v", names)
	}
}

func TestWhatItCannotUseItNames(t *testing.T) {
	for name, value := range map[string]any{
		"url": "ftp://x/", "piece_kib": 1, "archive_files": -1, "seconds": 0, "directory": "/does/not/exist",
	} {
		host, _, _ := server(t)
		host.Setting("chunk_hash_uploader."+name, value)
		if _, err := host.Start(&uploader{}); err == nil || !strings.Contains(err.Error()+"directory", name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	t.Setenv("AWS_ACCESS_KEY_ID", "only")
	host, _, _ := server(t)
	if _, err := host.Start(&uploader{}); err == nil || !strings.Contains(err.Error(), "AWS_SECRET_ACCESS_KEY") {
		t.Errorf("half of the credentials: %v", err)
	}
}

// The signature that botocore 1.44 makes of the same request: a PUT at the time and with the key of the
// examples in "Authenticating Requests: Using the Authorization Header" of the S3 documentation.
func TestSignatureIsVersion4(t *testing.T) {
	s, err := newStore("https://examplebucket.s3.amazonaws.com/", "us-east-1", func(name string) string {
		return map[string]string{
			"AWS_ACCESS_KEY_ID":     "AKIAIOSFODNN7EXAMPLE",
			"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
		}[name]
	})
	must(t, err)
	target, err := url.Parse("https://examplebucket.s3.amazonaws.com/a%20b/test.jsonl")
	must(t, err)
	request := &plugin.HTTPRequest{
		Method: "PUT", Body: []byte("Welcome to Amazon S3."),
		Headers: map[string]string{"content-type": "application/x-ndjson"},
	}
	s.sign(request, target, time.Date(2013, 5, 24, 0, 0, 0, 0, time.UTC))
	want := "f96a358f43651918a1523c6ebcbaf2c198d883433c599b3071e09bfbf75c2aaa"
	if _, got, _ := strings.Cut(request.Headers["authorization"], "Signature="); got != want {
		t.Errorf("signature %s", got)
	}
}

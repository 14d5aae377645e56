// A sandboxed plugin that ships the server's lookup-hash logs to an S3-compatible or plain HTTP store,
// and then moves them into an archive beside them.
//
// The server writes lookup_hashes_<time>_<number>.jsonl files into --lookup-hash-log-dir, the newest one
// line by line; the others are whole, and are sent. A file that is larger than a piece is sent as several
// objects, each of whole lines, so that each of them can be read on its own. An object is sent again
// until the store has it: what is in the archive is in the store.
package main

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"stockade.dev/plugin"
	"stockade.dev/plugin/reactor"
)

const (
	// defaultInterval is the time between two looks where nothing else is set.
	defaultInterval = time.Minute
	// defaultPieceKiB is the size of an object where nothing else is set.
	defaultPieceKiB = 1024
	// defaultKeep is how many files the archive holds where nothing else is set.
	defaultKeep = 100
	// directory is the granted directory, as a plugin finds it.
	directory = "/hashes"
)

type uploader struct {
	dir       string
	store     store
	pieceSize int
	keep      int
	newestAge time.Duration // after which the newest file is whole too; 0 for never

	upload *upload // of the file that is being sent
}

// settings are those of the plugin, chunk_hash_uploader.<name>.
type settings struct{ config *plugin.Config }

func (s settings) read(name string, into any) error {
	_, err := s.config.Setting("chunk_hash_uploader."+name, into)
	return err
}

func (u *uploader) Start(*plugin.Start) error {
	config, err := plugin.LoadConfig()
	if err != nil {
		return err
	}
	var url string
	if err := config.Required("chunk_hash_uploader.url", &url); err != nil {
		return err
	}
	region, pieceKiB := "us-east-1", defaultPieceKiB
	u.dir, u.keep = directory, defaultKeep
	settings := settings{config}
	if err := errors.Join(settings.read("region", &region), settings.read("piece_kib", &pieceKiB),
		settings.read("archive_files", &u.keep), settings.read("directory", &u.dir)); err != nil {
		return err
	}
	if pieceKiB < 16 || pieceKiB > 16<<10 {
		return fmt.Errorf("setting chunk_hash_uploader.piece_kib is %d: give 16 to 16384", pieceKiB)
	}
	if u.keep < 0 {
		return fmt.Errorf("setting chunk_hash_uploader.archive_files is %d: give 0 or more", u.keep)
	}
	u.pieceSize = pieceKiB << 10
	interval, err := config.Seconds("chunk_hash_uploader.seconds", 0.1, 86_400, defaultInterval)
	if err != nil {
		return err
	}
	// A server that gets no requests does not rotate; its file is left alone for as long as it may grow.
	if rotation := config.Obs.LookupHashLog.RotationIntervalSec; rotation > 0 {
		u.newestAge = time.Duration(min(rotation, 365*86_400)) * time.Second
	}
	u.store, err = newStore(url, region, os.Getenv)
	if err != nil {
		return err
	}
	if _, err := os.Stat(u.dir); err != nil {
		return fmt.Errorf("%s is not there: grant it in [directories] of the plugin's manifest (%w)", u.dir, err)
	}
	if err := os.MkdirAll(path.Join(u.dir, archive), 0o755); err != nil {
		return fmt.Errorf("%s/%s cannot be made: grant access = \"read-write\" (%w)", u.dir, archive, err)
	}
	plugin.Infof("shipping what is whole in %s to %s every %v", u.dir, u.store, interval)
	return plugin.Every("look", interval)
}

// Timer sends one object, so that a long way to go is many short calls.
func (u *uploader) Timer(timer *plugin.Timer) error {
	if timer.Name == "look" && u.upload != nil {
		return nil // The next piece has a timer of its own.
	}
	more, err := u.step()
	if err != nil {
		// The file is where it was, and the next look begins with it.
		u.upload = nil
		return errors.Join(plugin.AddMetric("upload_failures", 1), err)
	}
	if more {
		return plugin.Once("piece", 0)
	}
	return nil
}

// step sends the next object, if there is one; it tells whether another one may follow.
func (u *uploader) step() (bool, error) {
	if u.upload == nil {
		names, err := whole(u.dir, plugin.Now(), u.newestAge)
		if err != nil {
			return false, err
		}
		if err := plugin.SetMetric("files_waiting", float64(len(names))); err != nil {
			return false, err
		}
		if len(names) == 0 {
			return false, nil
		}
		u.upload = &upload{name: names[0]}
	}
	piece, err := u.upload.next(u.dir, u.pieceSize)
	if err != nil {
		return false, err
	}
	if len(piece.lines) > 0 {
		if err := u.store.put(piece.name, piece.lines, plugin.Now()); err != nil {
			return false, fmt.Errorf("%s: %w", piece.name, err)
		}
		if err := errors.Join(plugin.AddMetric("objects_uploaded", 1),
			plugin.AddMetric("bytes_uploaded", float64(len(piece.lines)))); err != nil {
			return false, err
		}
	}
	if !piece.isLast {
		return true, nil
	}
	name := u.upload.name
	u.upload = nil
	if err := putAway(u.dir, name, u.keep); err != nil {
		return false, err
	}
	plugin.Infof("%s is shipped", strings.TrimSuffix(name, suffix))
	return true, plugin.AddMetric("files_uploaded", 1)
}

func init() { reactor.Register(&uploader{}) }

func main() {}

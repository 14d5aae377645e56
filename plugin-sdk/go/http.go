package plugin

import "stockade.dev/plugin/internal/abi"

// HTTPRequest is a request to an address that the manifest's [[http]] tables grant.
type HTTPRequest struct {
	// Method is such as GET.
	Method string `json:"method"`
	// URL begins with http:// or https://.
	URL string `json:"url"`
	// Headers have names in any case. Host and Content-Length are the server's.
	Headers map[string]string `json:"headers"`
	// TimeoutMs is what it may take, at most the manifest's http_timeout_ms, which holds where it is 0.
	TimeoutMs int32 `json:"timeout_ms,omitempty"`
	// Body is what is sent, at most the manifest's http_body_kib.
	Body []byte `json:"-"`
}

// HTTPResponse is the head of a response. Its body waits at the server until Body reads it, or the
// next request is sent.
type HTTPResponse struct {
	// Status is such as 200.
	Status int `json:"status"`
	// Headers have names in lower case.
	Headers map[string]string `json:"headers"`
	// BodyBytes is the length of the body.
	BodyBytes uint64 `json:"body_bytes"`
}

// Get sends a GET.
func Get(url string) (*HTTPResponse, error) {
	return (&HTTPRequest{Method: "GET", URL: url}).Send()
}

// Send sends the request and waits for the response's head. A status of 400 or more is a response, not
// an error. It is Denied for an address that is not granted, Limit when there were too many requests or
// the body is too long, Timeout, or Unavailable when nobody answers.
func (r *HTTPRequest) Send() (*HTTPResponse, error) {
	request := *r
	if request.Headers == nil {
		request.Headers = map[string]string{}
	}
	text, err := written(request)
	if err != nil {
		return nil, err
	}
	head, err := answered(abi.HTTPRequest(text, r.Body))
	if err != nil {
		return nil, err
	}
	response := &HTTPResponse{}
	return response, parsed(head, response, "the head of a response")
}

// IsSuccess tells whether the status is 200 to 299.
func (r *HTTPResponse) IsSuccess() bool { return r.Status >= 200 && r.Status < 300 }

// Body reads the body. It is State when another request was sent since.
func (r *HTTPResponse) Body() ([]byte, error) {
	var body []byte
	piece := make([]byte, 64<<10)
	for {
		n, err := length(abi.HTTPBodyRead(piece))
		if err != nil || n == 0 {
			return body, err
		}
		body = append(body, piece[:n]...)
	}
}

// Browsers start no worker in a page that was opened from disk. There, the search runs in a hidden
// frame instead, which speaks as a worker does. (The theme would fetch a script for it.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      const script = inside.document.createElement("script")
      const loaded = new Promise((done, failed) => {
        script.onload = done
        script.onerror = failed
      })
      script.src = url
      inside.document.head.append(script)
      this.postMessage = data => {
        loaded.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
      }
      this.terminate = () => frame.remove()
    }
  }
}

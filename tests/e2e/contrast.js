// Returns the least contrast of what is seen, as WCAG 2.2 defines it: {text: [ratio, where], borders: [ratio, where]}.
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const part = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([red, green, blue]) => 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue);
  const ratio = (one, other) => {
    const [light, dark] = [luminance(one), luminance(other)].sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return rgba(getComputedStyle(document.documentElement).backgroundColor);
  };
  const name = (node) => `${node.tagName.toLowerCase()}${node.id && "#"}${node.id}.${node.getAttribute("class") ?? ""} ${(node.textContent ?? "").trim().slice(0, 30)}`;
  const isSeen = (node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !node.disabled;
  const least = (found) => found.reduce((most, one) => (one[0] < most[0] ? one : most), [Infinity, "nothing"]);

  const texts = [...document.querySelectorAll("body *")].filter((node) => isSeen(node) && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  // the label of a mark stands on the shape before it
  const ground = (node) => (node.matches("[class^=mark-] > text") ? rgba(getComputedStyle(node.previousElementSibling).fill) : behind(node.parentElement && node.namespaceURI.endsWith("svg") ? node.closest("figure, div") : node));
  const text = texts.map((node) => {
    const style = getComputedStyle(node);
    return [ratio(rgba(node.namespaceURI.endsWith("svg") ? style.fill : style.color), ground(node)), name(node)];
  });
  const controls = [...document.querySelectorAll("button.plain, button.action, select, textarea, input:not([type=radio], [type=checkbox], [type=range]), .segments span, .notice, [role=tablist], dialog[open], .mark")].filter(isSeen);
  const lines = [...document.querySelectorAll("path.line, .block, .axis, .limit")].filter(isSeen);
  const borders = [
    ...controls.flatMap((node) => ["Left", "Bottom"].filter((side) => parseFloat(getComputedStyle(node)[`border${side}Width`])).map((side) => [ratio(rgba(getComputedStyle(node)[`border${side}Color`]), behind(node.parentElement)), name(node)])),
    ...lines.map((node) => [ratio(rgba(node.matches(".block") ? getComputedStyle(node).fill : getComputedStyle(node).stroke), behind(node.closest("figure, div"))), name(node)]),
  ];
  return { text: least(text), borders: least(borders), counted: [text.length, borders.length] };
})()
